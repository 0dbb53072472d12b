"""Dashboard, scrape configuration and alert rules, all made from the one metrics catalogue."""
