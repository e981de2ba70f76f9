"""What the trainers share: settings, schedules, checkpoints, logging, pictures and validation by reconstruction."""
