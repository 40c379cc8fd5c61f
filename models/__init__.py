"""Networks, their configuration, and what reads weights into them."""
