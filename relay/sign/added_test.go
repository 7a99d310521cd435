package sign

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"
)

const addedFields = "Feedback-ID: spring:bulk:0abc:examplecorp\r\nCFBL-Address: r1@rp.example.com; report=arf\r\nCFBL-Feedback-ID: r1\r\n"

// TestSignCoversAddedFields: fields put in front of a message are in h=, once
// more than they occur, so that neither can they be taken away nor others added.
func TestSignCoversAddedFields(t *testing.T) {
	s, key := newSigner(t)
	message := []byte(strings.Replace(plainMessage, "Feedback-ID: a:b:c:d\r\n", "", 1))
	header, body := split(message)
	out, err := s.Sign(nil, []byte(addedFields), header, hashInPieces(NewBodyHasher(), body, 7), 0, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	signed := slices.Concat(out, []byte(addedFields), message)
	if v := verify(t, key, signed); len(v) != 1 || v[0].Err != nil {
		t.Fatalf("not verified: %+v\n%s", v, signed)
	}
	for field := range strings.SplitSeq(strings.TrimSuffix(addedFields, "\r\n"), "\r\n") {
		name, _, _ := strings.Cut(field, ":")
		if v := verify(t, key, bytes.Replace(signed, []byte(field+"\r\n"), nil, 1)); len(v) != 1 || v[0].Err == nil {
			t.Errorf("taking %s away does not break the signature", name)
		}
		if v := verify(t, key, slices.Concat([]byte(name+": forged\r\n"), signed)); len(v) != 1 || v[0].Err == nil {
			t.Errorf("a second %s field does not break the signature", name)
		}
	}
	plain := signMessage(t, s, message)
	if v := verify(t, key, slices.Concat([]byte("Feedback-ID: of:the:forwarder\r\n"), plain)); len(v) != 1 || v[0].Err != nil {
		t.Errorf("a Feedback-ID that a forwarder writes breaks the signature of mail without one: %+v", v)
	}
}

func TestNextField(t *testing.T) {
	header := []byte("Subject : a\r\n b: c\r\nno field\r\nX:\r\n\r\nBody: x\r\n")
	var got []string
	at := 0
	for {
		name, end, ok := NextField(header, at)
		if !ok {
			break
		}
		got = append(got, string(name))
		at = end
	}
	if want := []string{"Subject", "", "X"}; !slices.Equal(got, want) {
		t.Errorf("names %q, want %q", got, want)
	}
	if at != len("Subject : a\r\n b: c\r\nno field\r\nX:\r\n") {
		t.Errorf("ended at %d", at)
	}
	if _, _, ok := NextField(header, len(header)); ok {
		t.Error("a field behind the end")
	}
	if !IsField([]byte("feedback-ID"), "Feedback-ID") || IsField([]byte("Feedback-I"), "Feedback-ID") {
		t.Error("names are not compared without case")
	}
}
