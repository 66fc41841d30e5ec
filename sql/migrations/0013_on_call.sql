-- More columns of consumer_lag(), and another argument of peek(). They come back with this version's code.
drop function if exists consumer_lag(), peek(text, int);
