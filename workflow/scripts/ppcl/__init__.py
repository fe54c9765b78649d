from ppcl import quiet

quiet.start()
