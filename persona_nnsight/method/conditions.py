"""The names of the conditions, and what each of them writes."""

from __future__ import annotations

#: Conditions of `substitute`: written at one site of the XY run.
SUBSTITUTE_CONDITIONS = {
    "additive": "h_BB + Δ_X + Δ_Y, the paper's substitution",
    "remove_x": "h_XY - Δ_X, the persona's effect taken out",
    "remove_y": "h_XY - Δ_Y, the task's effect taken out",
    "bb": "h_BB, neither persona nor task (control)",
    "by": "h_BY, the task alone (control)",
    "xb": "h_XB, the persona alone (control)",
    "other_x": "h_BB + Δ_X' + Δ_Y with another persona X' (control)",
    "random": "h_BB + a random vector as long as Δ_XY (control)",
    "clean": "h_XY itself, which changes nothing but what rounding does (control)",
    "rounded": "h_XY, each number moved by a rounding error of the model's dtype (control)",
}

#: Run in every dtype of fewer bits than float32, whose rounding shows.
ROUNDED = "rounded"

#: The condition of `inject` that writes nothing: the persona-free prompt as it is.
HOST = "host"

#: Conditions of `inject`: written into the BY host, the prompt without its persona.
INJECT_CONDITIONS = {
    "oracle": "h_XY, the residual of the prompt with its persona",
    "cached": "h_BB + Δ_X + Δ_Y, what a cache of persona and task effects would hold",
}

#: The task alone as the user message: no persona, no baseline, nothing written.
BARE = "bare"

#: Conditions of `markers`: what the text is generated under.
MARKER_CONDITIONS = {
    "clean": "the XY prompt as it is",
    "additive": SUBSTITUTE_CONDITIONS["additive"],
    "remove_x": SUBSTITUTE_CONDITIONS["remove_x"],
    BARE: "the task alone as the user message, nothing written (control)",
}

#: The condition of `steer`: h_BB + α·Δ_X + β·Δ_Y.
STEER = "steer"

#: Conditions that show what rounding costs; nothing is set against them.
FLOORS = ("clean", ROUNDED)

#: By host, the condition that shares and margins are of.
BASELINE = {"XY": "bb", "BY": HOST}

#: What the conditions of XY are set against at their site. In BY all are set against its baseline.
CONTROLS = {
    "additive": tuple(name for name in SUBSTITUTE_CONDITIONS if name not in ("additive", *FLOORS)),
    STEER: (BASELINE["XY"],),
}

#: What the conditions of `markers` are set against.
MARKER_CONTROLS = {
    "additive": ("clean",),
    "remove_x": ("clean", "additive"),
    BARE: ("clean",),
}

#: Prompts whose residuals the formulas read; OB is the prompt of the other persona X' (`other_x`).
RESIDUAL_KEYS = ("BB", "XB", "BY", "XY")
DONOR_KEY = "OB"

#: Those that the formula of each condition reads.
READS = {
    "additive": ("BB", "XB", "BY"),
    "remove_x": ("BB", "XB", "XY"),
    "remove_y": ("BB", "BY", "XY"),
    "bb": ("BB",),
    "by": ("BY",),
    "xb": ("XB",),
    "other_x": ("BB", DONOR_KEY, "BY"),
    "random": ("BB", "XY"),
    "clean": ("XY",),
    ROUNDED: ("XY",),
    "oracle": ("XY",),
    "cached": ("BB", "XB", "BY"),
    STEER: ("BB", "XB", "BY"),
}

#: The prompt of `bare`; no formula reads its residuals.
TASK_KEY = "Y"
