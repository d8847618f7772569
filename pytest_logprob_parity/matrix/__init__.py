"""Check goldens of one engine version in many others, each in an environment of its own."""
