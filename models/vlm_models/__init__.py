"""What a vision-language model is: errors, spec, checkpoint, the three parts. Importing it loads no framework."""
