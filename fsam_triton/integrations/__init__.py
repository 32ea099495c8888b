"""Sharpness-aware training inside other libraries' training loops; nothing here is imported by `fsam_triton` itself."""
