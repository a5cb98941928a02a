"""The pipeline: schedules as pure data, channels between stages, and the engine that runs both."""
