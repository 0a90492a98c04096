"""The status collector: takes what devices report of their updates, and shows how a rollout goes.

store.py   reports and tokens in a database
app.py     what is asked over HTTP: reports in, a page and JSON out
page.html  the page
"""
