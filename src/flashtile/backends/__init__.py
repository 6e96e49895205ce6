"""The host side of each backend: `forward` and `backward` of a `Call` by a `Plan`."""
