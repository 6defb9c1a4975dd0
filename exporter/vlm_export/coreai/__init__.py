"""Core AI: `.aimodel` assets for iOS and macOS 27, from the checkpoint's own modules and the one walk."""
