"""How one rule is carried over many arrays. Knows rules and arrays, no models and no API."""
