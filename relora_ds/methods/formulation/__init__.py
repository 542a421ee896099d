"""How projections compute what their parameters amount to: which ways there are, and the choice."""
