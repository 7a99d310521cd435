package verdict

// CutEnhanced splits an enhanced status code off the front of a reply line
// whose three-digit code is already removed (RFC 2034 section 4). It looks
// nowhere else: "5.1.1" inside a host name, an address or a message id is not
// a code. Without one, code is empty and rest is the whole text.
func CutEnhanced[T string | []byte](text T) (code, rest T) {
	begin := 0
	for begin < len(text) && text[begin] == ' ' {
		begin++
	}
	// RFC 3463 section 2: class "." subject "." detail, 1 and 1 to 3 digits.
	i := begin
	if i >= len(text) || text[i] != '2' && text[i] != '4' && text[i] != '5' {
		return text[:0], text
	}
	i++
	for range 2 {
		if i >= len(text) || text[i] != '.' {
			return text[:0], text
		}
		i++
		digits := 0
		for i < len(text) && text[i] >= '0' && text[i] <= '9' && digits < 3 {
			i++
			digits++
		}
		if digits == 0 {
			return text[:0], text
		}
	}
	if i < len(text) && text[i] != ' ' && text[i] != '\t' {
		return text[:0], text
	}
	code = text[begin:i]
	for i < len(text) && (text[i] == ' ' || text[i] == '\t') {
		i++
	}
	return code, text[i:]
}
