"""How a model is cut over processes: the topology and the linear layers it asks for."""
