"""The paper's tables on any model: protocol, runs, and the published figures beside them."""
