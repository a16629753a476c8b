"""The paper's definitions: sites, conditions, edit vectors, geometry, KL, markers."""
