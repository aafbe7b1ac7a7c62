"""Bad input as a campaign: many wrong configurations, prompt files and models, and what becomes of each."""
