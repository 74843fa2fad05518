"""Programs that others wrote and that guestpv is tested and measured against, as they are started here."""
