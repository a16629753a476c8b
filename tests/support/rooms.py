"""The rooms of the package, and which arrows there are between them."""

from __future__ import annotations

#: The rooms, bottom up, and of those below the ones that each takes from.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "method": {"errors"},
    "prompts": {"errors", "method"},
    "models": {"errors"},
    "plan": {"errors", "method", "prompts", "models"},
    "engine": {"errors", "method", "prompts", "models", "plan"},
    "storage": {"errors", "prompts", "models", "plan"},
    "analysis": {"method", "prompts", "plan"},
    "backends": {"errors", "models", "plan", "engine", "storage"},
    "pages": {"method", "prompts", "analysis"},
    "experiments": {
        *("errors", "method", "prompts", "models", "plan", "engine"),
        *("storage", "analysis", "backends", "pages"),
    },
    "reproduction": {
        *("errors", "method", "prompts", "models", "plan"),
        *("storage", "analysis", "backends", "pages", "experiments"),
    },
    "report": {
        *("errors", "method", "prompts"),
        *("storage", "analysis", "pages", "experiments", "reproduction"),
    },
}
