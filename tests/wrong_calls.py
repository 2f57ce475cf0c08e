CALLS = []
def call(s, w): pass
