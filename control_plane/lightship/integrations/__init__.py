"""One file per third-party platform; whoever knows a vendor's ways lives here, and is imported lazily."""
