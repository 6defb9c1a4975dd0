"""Core ML packages: traced or emitted, compressed, merged and looked over before they are published."""
