"""What a plan says (`describe`) and what differs between two (`difference`). Changes nothing."""
