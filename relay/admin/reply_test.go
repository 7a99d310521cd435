package admin

import (
	"testing"

	"github.com/relais-mta/relais/relay"
)

func TestReplyText(t *testing.T) {
	for _, tc := range []struct {
		reply relay.Reply
		want  string
	}{
		{relay.Reply{Code: 550, Enhanced: "5.1.1", Text: "no such user"}, "550 5.1.1 no such user"},
		{relay.Reply{Code: 250, Text: "ok"}, "250 ok"},
		{relay.Reply{Enhanced: "5.6.7", Text: "not ASCII"}, "5.6.7 not ASCII"},
		{relay.Reply{Text: "the clock is wrong"}, "the clock is wrong"},
		{relay.Reply{}, ""},
	} {
		if got := replyText(&tc.reply); got != tc.want {
			t.Errorf("%+v: %q, want %q", tc.reply, got, tc.want)
		}
	}
}
