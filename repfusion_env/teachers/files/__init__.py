"""What teachers are on disk: configurations, weights, text encoders."""
