// From disk, a browser may not fetch pages for the summaries of a search: titles are enough there
if (location.protocol === 'file:') DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false
