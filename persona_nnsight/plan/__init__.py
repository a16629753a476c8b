"""A run before it runs, as plain data: what it computes, costs, shares and hands over."""
