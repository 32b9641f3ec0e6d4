"""What a kernel did wrong."""


class Fault(Exception):
    """Raised by an instruction; the machine adds which one it was, and of which kernel."""
