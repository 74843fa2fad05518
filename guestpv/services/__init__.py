"""What the ``up`` commands run: a driven device joined to something that the guest can use."""
