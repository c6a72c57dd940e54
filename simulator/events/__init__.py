"""What happens besides requests: faults, plan switches, replanning. Knows the loop's clock."""
