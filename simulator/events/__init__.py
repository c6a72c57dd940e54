"""What happens beside requests: faults, plan switches, replanning. Knows the event loop's clock."""
