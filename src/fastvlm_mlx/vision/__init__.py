"""Vision encoders: pixels to image tokens."""
