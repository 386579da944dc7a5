"""The stored format of an object on a tier: header, payload and checksums, with encoding and verified decoding."""
