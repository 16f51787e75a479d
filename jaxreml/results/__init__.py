"""What people hold: fits of one response and of many, their tables, figures and files."""
