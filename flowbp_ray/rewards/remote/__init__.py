"""A reward pool in another cluster: what travels (`wire`, `codec`), who asks (`client`).

`service` answers, `server` does so over HTTP; `identity` is what both must agree on.
"""
