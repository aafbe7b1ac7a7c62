"""A reward pool in another cluster: what travels (`wire`, as bytes `codec`), who asks (`client`), who answers (`service`, `server`)."""
