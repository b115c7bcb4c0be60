"""What is minimised: losses, targets, schedules, what trains, and the step that follows a gradient."""
