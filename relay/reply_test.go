package relay

import "testing"

func TestReplyAsText(t *testing.T) {
	for _, tc := range []struct {
		reply Reply
		want  string
	}{
		{Reply{Code: 550, Enhanced: "5.1.1", Text: "no such user"}, "550 5.1.1 no such user"},
		{Reply{Code: 250, Text: "ok"}, "250 ok"},
		{Reply{Enhanced: "5.6.7", Text: "not ASCII"}, "5.6.7 not ASCII"},
		{Reply{Text: "the clock is wrong"}, "the clock is wrong"},
		{Reply{}, ""},
	} {
		if got := tc.reply.String(); got != tc.want {
			t.Errorf("%+v: %q, want %q", tc.reply, got, tc.want)
		}
	}
}
