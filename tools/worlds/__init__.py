"""One test body, many worlds: what a driver must do wherever its device lives.

``bodies`` says what must hold, given nothing but a way to open the device; ``schemes`` has the worlds. The
tiers join the two, and a new scheme is a new class in ``schemes``.
"""
