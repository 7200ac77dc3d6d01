"""What a published folder says about its model, read without torch; no device needs it."""
