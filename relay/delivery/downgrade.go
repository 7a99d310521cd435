package delivery

import "github.com/relais-mta/relais/shared/fault"

// downgrade refuses: a host without 8BITMIME gets no message with octets above
// 127.
func downgrade(_ *Content, _ bool) ([]byte, error) {
	return nil, fault.New(fault.Invalid, "delivery.downgrade", "the host does not take 8-bit mail")
}
