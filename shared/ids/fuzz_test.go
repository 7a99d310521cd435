package ids

import "testing"

// FuzzParse holds that an id that is taken from text has one meaning: its own
// text form gives it again.
func FuzzParse(f *testing.F) {
	f.Add("msg_01kampxh00041061050r3gg28a")
	f.Add("rcp_01kampxh00041061050r3gg28a-7")
	f.Add("rcp_01kampxh00041061050r3gg28a-65536")
	f.Add("msg_")
	f.Fuzz(func(t *testing.T, text string) {
		if id, err := ParseMessage(text); err == nil && !id.IsZero() { // zero has no text form
			if back, err := ParseMessage(id.String()); err != nil || back != id {
				t.Fatalf("%q is %v, which is %v, %v", text, id, back, err)
			}
		}
		if r, err := ParseRecipient(text); err == nil && !r.Message.IsZero() {
			if back, err := ParseRecipient(r.String()); err != nil || back != r {
				t.Fatalf("%q is %v, which is %v, %v", text, r, back, err)
			}
		}
	})
}
