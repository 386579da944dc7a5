"""The bytes of an object on a tier: header, payload, checksums, and how they are read back."""
