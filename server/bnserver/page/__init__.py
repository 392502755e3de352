"""`--dashboard`: a web page that shows what the service does, live. It reads, and changes nothing.

`history` keeps what was lately seen, `application` answers requests, `endpoint` is the port. `static` holds what a
browser loads: nothing of it comes from another address, and nothing of it is built. The package needs the extra
`dashboard`.
"""
