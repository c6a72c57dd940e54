"""Many scenarios side by side: `grid` lists them, `run` runs them, `resume` keeps what was done."""
