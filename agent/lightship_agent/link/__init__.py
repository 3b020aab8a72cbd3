"""The device's link home: identity and enrolment, the HTTPS client, the MQTT session, the on-disk outbox."""
