"""Video: frames in, tracked masks out, in constant memory."""
