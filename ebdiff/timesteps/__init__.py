"""Which timesteps to draw, and with which weight."""
