"""Pure functions without parameters: attention, RoPE, windows, boxes, RoIAlign, resizing, positions."""
