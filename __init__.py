"""Loadmaster: decides which GPU every expert of a mixture-of-experts model lives on."""
