package main

import (
	"io"
	"net"

	"github.com/emersion/go-smtp"
)

// nullRelay takes mail with go-smtp's server and hands it on, while it comes,
// with go-smtp's client: one connection out for each one in. It keeps nothing,
// so it shows what the library's two ends cost.
func nullRelay(args []string) error {
	if len(args) != 2 {
		return errUsage
	}
	s := smtp.NewServer(smtp.BackendFunc(func(*smtp.Conn) (smtp.Session, error) { return &nullSession{to: args[1]}, nil }))
	s.Domain = "null.test"
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		return err
	}
	return s.Serve(l)
}

type nullSession struct {
	to   string
	out  *smtp.Client
	from string
	rcpt []string
}

// Mail implements smtp.Session.
func (s *nullSession) Mail(from string, _ *smtp.MailOptions) error {
	s.from, s.rcpt = from, s.rcpt[:0]
	return nil
}

// Rcpt implements smtp.Session.
func (s *nullSession) Rcpt(to string, _ *smtp.RcptOptions) error {
	s.rcpt = append(s.rcpt, to)
	return nil
}

// Data implements smtp.Session.
func (s *nullSession) Data(r io.Reader) error {
	if s.out == nil {
		var err error
		if s.out, err = smtp.Dial(s.to); err != nil {
			return err
		}
		if err := s.out.Hello("null.test"); err != nil {
			return err
		}
	}
	if err := s.out.Mail(s.from, nil); err != nil {
		return err
	}
	for _, to := range s.rcpt {
		if err := s.out.Rcpt(to, nil); err != nil {
			return err
		}
	}
	w, err := s.out.Data()
	if err != nil {
		return err
	}
	if _, err := io.Copy(w, r); err != nil {
		return err
	}
	return w.Close()
}

// Reset implements smtp.Session.
func (s *nullSession) Reset() {}

// Logout implements smtp.Session.
func (s *nullSession) Logout() error {
	if s.out == nil {
		return nil
	}
	return s.out.Quit()
}
